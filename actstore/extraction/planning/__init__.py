"""Planning checks and counts everything that a job asks for, before anything is computed."""
