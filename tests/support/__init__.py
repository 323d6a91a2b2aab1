"""What several suites share: cases, the definition in float64, how runs are made and compared."""
