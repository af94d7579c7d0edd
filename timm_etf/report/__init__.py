"""What measuring verbs say alike: statistics, the results file, tables and pictures."""
