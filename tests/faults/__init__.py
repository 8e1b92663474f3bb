"""
What users complain about in sandbox servers, as probes that can be pointed at any server of this contract by its URL.

``python -m tests.faults --url http://127.0.0.1:3030 --secret SECRET`` prints a table. It needs nothing but the standard
library, and sees the server through its HTTP API alone.
"""
