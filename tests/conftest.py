"""What all tests share is in a plugin: a process that hands tests to workers does without torch."""


def pytest_configure(config):
    """Load it where tests are collected."""
    hands_out = config.getoption("dist", "no") != "no" and not config.option.collectonly
    if hasattr(config, "workerinput") or not hands_out:
        config.pluginmanager.import_plugin("support.plugin")
