"""The page of ``lrk report``: its template, style and script, and what they are filled with."""
