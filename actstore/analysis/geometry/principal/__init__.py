"""Principal components: computing, keeping and drawing them."""
