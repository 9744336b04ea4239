"""SGLang seen from outside: every place where the product reaches into it by name."""
