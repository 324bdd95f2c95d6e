"""Pictures for people: of data and, in time, of what a model has learnt."""
