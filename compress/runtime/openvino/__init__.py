"""The OpenVINO runtime: a whole VLM as graphs whose constants are svlm's own integers and scales."""
