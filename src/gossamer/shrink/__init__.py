"""From zeros to a smaller network: slice, verify, and the plan that rebuilds it."""
