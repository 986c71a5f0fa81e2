"""How a problem is computed: ``make_plan`` chooses a strategy and a backend and lays out the chunks."""
