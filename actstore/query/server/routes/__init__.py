"""Routes are the HTTP interface, with one file for each kind of resource.

To add one, add its router to ``_routes`` in `actstore.query.server.app`, and run schemas/export.py.
"""
