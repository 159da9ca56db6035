from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    isa_variants: dict[str, str]

def build_info() -> BuildInfo: ...
def cpu_features() -> dict[str, bool]: ...
def isa_name() -> str: ...
