"""From stored cells to verdicts and pages."""
