"""What E2E-QP and E2E-QAT have in common: settings, checks of the data, order and shares of the windows, the state."""
