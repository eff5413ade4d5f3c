"""The page at `/`: what this replica has scored lately, as it happens. Built from `console/`; without that build, a plain table."""
