# The image of snapmerge: the program, the tools for file systems that it runs,
# and nothing else.
#
#	docker build --build-arg VERSION=$(git describe --tags --always) -t snapmerge/snapmerge .

FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=unknown
RUN make build VERSION="$VERSION"

FROM debian:bookworm-slim AS rootfs
RUN apt-get update && apt-get install -y --no-install-recommends e2fsprogs xfsprogs util-linux mount
COPY --from=build /src/hack/rootfs.sh /src/bin/snapmerge /build/
RUN /build/rootfs.sh /rootfs /build/snapmerge

FROM scratch
COPY --from=rootfs /rootfs /
ENV PATH=/usr/sbin:/usr/bin
ENTRYPOINT ["/usr/bin/snapmerge"]
