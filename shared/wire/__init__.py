"""The service on the wire: stubs generated from proto/, and the borders between them and our own objects."""

GRPC_PORT = 50051
HTTP_PORT = 8080
