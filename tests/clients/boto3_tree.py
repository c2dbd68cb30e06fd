"""Puts a tree into a bucket and gets it back with boto3: plain and multipart uploads, each checksum algorithm in turn.

    boto3_tree.py put FOLDER BUCKET
    boto3_tree.py get FOLDER BUCKET
"""

import os
import sys

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

ALGORITHMS = ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256", None]
SMALL_PARTS = TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20, max_concurrency=4)


def files(folder):
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                yield path, os.path.relpath(path, folder)


def usable():
    # CRC32C and CRC64NVME need botocore's optional native library; take those this installation can make.
    found = []
    for algorithm in ALGORITHMS:
        try:
            if algorithm:
                from botocore.httpchecksum import _CHECKSUM_CLS

                if algorithm.lower() not in _CHECKSUM_CLS:
                    continue
            found.append(algorithm)
        except ImportError:
            found.append(algorithm)
    return found


def main():
    verb, folder, bucket = sys.argv[1:4]
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 8}))
    if verb == "put":
        client.create_bucket(Bucket=bucket)
        algorithms = usable()
        for number, (path, key) in enumerate(sorted(files(folder))):
            algorithm = algorithms[number % len(algorithms)]
            extra = {"Metadata": {"number": str(number)}}
            if algorithm:
                extra["ChecksumAlgorithm"] = algorithm
            client.upload_file(path, bucket, key, ExtraArgs=extra, Config=SMALL_PARTS)
    elif verb == "get":
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, PaginationConfig={"PageSize": 100}):
            for entry in page.get("Contents", []):
                target = os.path.join(folder, entry["Key"])
                os.makedirs(os.path.dirname(target), exist_ok=True)
                client.download_file(bucket, entry["Key"], target, Config=SMALL_PARTS)
    else:
        sys.exit("put or get")


main()
