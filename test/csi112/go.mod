// A module of its own: it needs the CSI types of 1.12, which kubelets up to 1.36
// have, and the driver those of 1.13.
module github.com/snapmerge/snapmerge/test/csi112

go 1.26.0

require (
	github.com/container-storage-interface/spec v1.12.0 // the types as they were
	google.golang.org/protobuf v1.36.12 // decoding
)

require (
	github.com/golang/protobuf v1.5.4 // indirect
	golang.org/x/net v0.38.0 // indirect
	golang.org/x/sys v0.31.0 // indirect
	golang.org/x/text v0.23.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20230803162519-f966b187b2e5 // indirect
	google.golang.org/grpc v1.57.1 // indirect
)
