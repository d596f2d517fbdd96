"""What `gossamer train` needs: configuration, data, models, the run. Nothing imports this room."""
