#!/bin/sh
# Brings up a kind cluster of three nodes with snapmerge in it, for trying it out:
# builds the image, loads it, and installs the snapshot controller and the chart as
# the tests do in test/e2e. hack/kind-down.sh takes all of it away again.
#
# Needs Docker, kind, kubectl, Go, Helm, and the kernel modules fuse and loop. All
# nodes share the machine's kernel and its /dev. Each has a directory of its own for
# volumes below POOLS.
#
# Usage: hack/kind-up.sh [--dry-run]    (--dry-run prints what would be done)
#	CLUSTER  name of the cluster (snapmerge)
#	POOLS    directory on ext4 or xfs for the nodes' volumes (/var/tmp/snapmerge-kind)
set -eu
cd "$(dirname "$0")/.."

cluster=${CLUSTER:-snapmerge} pools=${POOLS:-/var/tmp/snapmerge-kind} dry=
case "${1:-}" in
'') ;;
--dry-run) dry=1 ;;
*)
	echo "usage: hack/kind-up.sh [--dry-run]" >&2
	exit 2
	;;
esac

# run runs a command, or only prints it.
run() {
	echo "+ $*"
	[ -n "$dry" ] || "$@"
}

# kube is kubectl in the cluster.
kube() { run kubectl --context "kind-$cluster" "$@"; }

# config is what the cluster is made from. Devices that the node plugin makes appear
# in the machine's /dev; a node's own /dev would not have them.
config() {
	echo "kind: Cluster"
	echo "apiVersion: kind.x-k8s.io/v1alpha4"
	echo "nodes:"
	for node in control-plane worker worker2; do
		cat <<-END
			  - role: ${node%2}
			    extraMounts:
			      - hostPath: /dev
			        containerPath: /dev
			      - hostPath: $pools/$node
			        containerPath: /var/lib/snapmerge
		END
	done
}

if [ -z "$dry" ]; then
	for tool in docker kind kubectl go helm; do
		command -v "$tool" >/dev/null || {
			echo "$tool is missing" >&2
			exit 1
		}
	done
	for device in /dev/fuse /dev/loop-control; do
		[ -e "$device" ] || {
			echo "$device is missing: modprobe fuse loop" >&2
			exit 1
		}
	done
fi

version=$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' charts/snapmerge/Chart.yaml)
image=snapmerge/snapmerge:$version
crds=$(cd test/e2e/sidecars && go mod download github.com/kubernetes-csi/external-snapshotter/client/v8 && go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)/config/crd

run docker build --build-arg "VERSION=$version" --tag "$image" .
for node in control-plane worker worker2; do
	run mkdir -p "$pools/$node"
done
echo "+ kind create cluster --name $cluster --config - <<END"
config
echo "END"
[ -n "$dry" ] || config | kind create cluster --name "$cluster" --config -
run kind load docker-image --name "$cluster" "$image"

for kind in volumesnapshotclasses volumesnapshotcontents volumesnapshots; do
	kube apply --filename "$crds/snapshot.storage.k8s.io_$kind.yaml"
done
kube wait --for=condition=Established --timeout=30s crd --all
kube apply --filename test/e2e/manifests/snapshot-controller.yaml
run helm --kube-context "kind-$cluster" upgrade --install snapmerge charts/snapmerge --namespace snapmerge --create-namespace
kube --namespace kube-system rollout status --timeout=5m deployment/snapshot-controller
kube --namespace snapmerge rollout status --timeout=5m daemonset/snapmerge-node

cat <<END

snapmerge runs in the cluster kind-$cluster. A first volume, snapshot and restore:
see the comment at the top of deploy/example.yaml. hack/kind-down.sh ends it.
END
