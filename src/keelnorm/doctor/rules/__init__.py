"""One file a rule. Each sets `RULE`; its identifier orders the list."""
