"""The commands of `heddle`, each imported when it is used."""
