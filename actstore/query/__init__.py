"""Stores over HTTP: `actstore.query.server` serves them, `actstore.query.client` reads them."""
