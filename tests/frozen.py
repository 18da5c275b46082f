"""The last import of the server that children are forked from: what it holds is no garbage.

A full collection over the objects of torch and transformers takes each child half a second.
"""

import gc

gc.freeze()
