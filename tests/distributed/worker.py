"""What a launcher is given to run in the tests: `llmnorm WORDS`, in a process that it forks.

It ends without SystemExit where all went well, as torch's launcher wants it of a forked script.
"""

import signal
import sys

from llmnorm import cli

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)  # as after an exec; the fork has the launcher's handlers

if code := cli.main(sys.argv[1:]):
    sys.exit(code)
