"""Strategies, hosts and signals: what runs where, together with whom."""
