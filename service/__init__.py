"""The HTTP service: APIs, uploads, tokens, the page.  Knows FastAPI, and of Ray only that jobs get done.

What is done with a job is ``actors``' and ``pipeline``'s business; here requests become jobs in the store,
and jobs become answers.
"""
