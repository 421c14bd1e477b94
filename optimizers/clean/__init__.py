"""Passes that leave less: constants computed, shapes known, no-ops and leftovers gone."""
