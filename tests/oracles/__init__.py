"""Small models whose every outcome can be listed."""
