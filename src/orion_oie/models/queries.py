"""The query of a file's address: what of it names the file, and what only signs a request.

Pure. A signature is a secret, and it changes from call to call, so it is part of no identity.
"""

from urllib.parse import parse_qsl, urlencode

# Of Amazon S3 and CloudFront, Google, Azure, Akamai, and of addresses with a password of their own.
_SIGNING_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-cos-", "q-")
_SIGNING = frozenset(
    {
        *("awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "key-pair-id", "policy"),
        *("signature", "expires", "expiry", "exp", "e", "sig", "sign", "hmac", "digest", "auth"),
        *("sv", "se", "sp", "sr", "st", "spr", "sip", "ss", "srt", "sks", "skt", "ske", "skv"),
        *("skoid", "sktid", "skn", "saoid", "suoid", "scid"),
        *("hdnts", "hdnea", "hdntl", "verify", "t", "ts", "timestamp", "nonce"),
        *("token", "access_token", "auth_token", "api_key", "apikey", "api-key", "key", "secret"),
        *("password", "pass", "pwd", "session", "jwt", "bearer", "rlkey", "st", "download", "dl"),
    }
)
_VERSIONS = frozenset({"versionid", "generation"})  # they choose among contents of one name


def lasting_query(query: str, file_name: str) -> str:
    """The part of a query that says which file is meant, "" for none: it may be shown and saved.

    A name that ends in `.gguf` says it alone, except for the version of the file.
    """
    kept = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        lower = name.lower()
        is_signing = lower in _SIGNING or lower.startswith(_SIGNING_PREFIXES)
        if lower in _VERSIONS or not (is_signing or file_name.lower().endswith(".gguf")):
            kept.append((name, value))
    return urlencode(sorted(kept))


def without_query(text: str) -> str:
    """An address for a message: nothing after its `?` or `#`, and no password before its host."""
    shown = text.partition("?")[0].partition("#")[0]
    scheme, separator, rest = shown.partition("://")
    if not separator:
        return shown
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
