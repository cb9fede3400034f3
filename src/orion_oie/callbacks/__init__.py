"""Where code of the application is called: on threads that nothing else needs.

Such code may call the library, block and raise anything, so no thread that answers, loads, reads or
watches a clock runs it. For other packages: threads (a thread for each call), delivery (items for
one callback, in their order), line (callbacks that need not wait for each other), host_log (the
application's logging).
"""
