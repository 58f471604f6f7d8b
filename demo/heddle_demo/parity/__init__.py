"""Every adapter method against the library it comes from: `heddle bench methods`, which writes docs/methods.md."""
