"""Stores over HTTP: `actstore.query.server` gives them, `actstore.query.client` reads them."""
