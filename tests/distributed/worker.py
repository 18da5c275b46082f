"""What a launcher is given to run in the tests: `llmnorm WORDS`, in a process that it forks.

It ends without SystemExit where all went well, as torch's launcher wants it of a forked script.
"""

import sys

from llmnorm import cli

if code := cli.main(sys.argv[1:]):
    sys.exit(code)
