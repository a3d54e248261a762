"""What all tests share is in a plugin: a process that hands tests to workers does without torch."""


def pytest_configure(config):
    """Load it where tests run."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("support.plugin")
