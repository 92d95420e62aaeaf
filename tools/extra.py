"""Print the requirements of one extra of setup.cfg, one a line: they install without building the package again."""

import configparser
import sys

setup = configparser.ConfigParser()
setup.read("setup.cfg")
print(setup["options.extras_require"][sys.argv[1]].strip())
