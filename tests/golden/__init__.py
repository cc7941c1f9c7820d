"""The golden record: what ``lrk`` printed, computed and wrote before a change that must leave all of it as it is.

``transcripts/`` holds commands and all that they print, ``given/`` the files that these commands read, ``runs/`` small
run folders; ``tests/test_golden.py`` checks them. Losses, scores and weights differ between processors in their last
bits, so ``python -m tests.golden`` records them in a folder of the user's, to be checked on the same machine.
"""
