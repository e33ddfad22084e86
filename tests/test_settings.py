"""Settings come from the environment, and a typo in them is an error."""

import pytest

from pipeline.errors import ConfigurationError
from pipeline.settings import Settings


def test_defaults_need_no_environment() -> None:
    """An empty environment gives the defaults; foreign variables are ignored."""
    settings = Settings.from_env({"HOME": "/nowhere", "RAY_ADDRESS": "x"})
    assert (settings.engine, settings.port_range, settings.ray_address) == ("auto", (8188, 8699), "local")


def test_values_are_read_and_typed() -> None:
    """Each field is INFINITETALK_<FIELD>; an empty value counts as not set."""
    settings = Settings.from_env(
        {
            "INFINITETALK_ENGINE": "draft",
            "INFINITETALK_PORTS": "9000-9010",
            "INFINITETALK_DRAFT_ARGS": "--draft-window-seconds 2",
            "INFINITETALK_COMFYUI_DIR": "",
        }
    )
    assert (settings.engine, settings.port_range, settings.comfyui_dir) == ("draft", (9000, 9010), None)
    assert settings.draft_flags == ["--draft-window-seconds", "2"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"INFINITETALK_ENGIN": "draft"}, "INFINITETALK_ENGIN is not a setting"),
        ({"INFINITETALK_ENGINE": "magic"}, "INFINITETALK_ENGINE"),
        ({"INFINITETALK_PORTS": "80-90"}, "INFINITETALK_PORTS.*no range of ports"),
        ({"INFINITETALK_PORTS": "9000-8000"}, "INFINITETALK_PORTS.*no range of ports"),
        ({"INFINITETALK_PORTS": "9000"}, "INFINITETALK_PORTS.*no range of ports"),
    ],
)
def test_a_wrong_setting_is_named(env: dict[str, str], words: str) -> None:
    """Unknown names and unusable values are ConfigurationErrors that name the variable."""
    with pytest.raises(ConfigurationError, match=words):
        Settings.from_env(env)
