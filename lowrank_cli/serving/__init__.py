"""Answers to many requests at a time, and the server that offers them: ``lrk serve``.

The engine (:mod:`.engine`, :mod:`.lanes`) knows nothing of HTTP; :mod:`.app` is the HTTP interface.
"""
