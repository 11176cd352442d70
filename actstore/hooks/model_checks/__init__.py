"""A loaded model is run and checked here before anybody relies on its hooks."""
