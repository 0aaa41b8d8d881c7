from leanmill.api import load_recipe as load_recipe
from leanmill.api import train as train
from leanmill.integrations import attach as attach
from leanmill.integrations import fold as fold

__version__: str
