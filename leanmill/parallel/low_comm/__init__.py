"""Workers that train one model and exchange what they learned every some hundred steps."""
