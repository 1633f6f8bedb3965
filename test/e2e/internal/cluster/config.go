package cluster

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	// Node is the name of the only node.
	Node = "node1"

	bridge      = "cni0"
	nodeAddress = "10.244.0.1"
	podNetwork  = "10.244.0.0/24"
	apiAddress  = "10.96.0.1" // the first of serviceNetwork: the service "kubernetes"
	services    = "10.96.0.0/16"
	token       = "admin" // nothing outside the namespaces reaches the API

	// Sandbox is the image of the pods' sandboxes, which has to be imported.
	Sandbox = "localhost/sandbox:e2e"

	// StateDir is where the node's disk for volumes is mounted.
	StateDir = "/var/lib/snapmerge"
)

// writeConfig writes the files that the components are configured by. In them
// @DIR@ stands for the cluster's directory.
func (c *Cluster) writeConfig() error {
	if err := c.writeKey(); err != nil {
		return err
	}
	replace := strings.NewReplacer("@DIR@", c.dir, "@DEBIAN@", c.debian, "@CGROUP@", c.cgroup)
	for name, text := range map[string]string{
		"pki/tokens.csv":      token + ",admin,1,system:masters\n",
		"kubeconfig":          kubeconfig,
		"kubelet.yaml":        kubeletConfig,
		"containerd.toml":     containerdConfig,
		"cni/10-e2e.conflist": cniConfig,
	} {
		path := filepath.Join(c.dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(replace.Replace(text)), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// writeKey makes the key that service accounts' tokens are signed with.
func (c *Cluster) writeKey() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	pki := filepath.Join(c.dir, "pki")
	if err := os.MkdirAll(pki, 0o755); err != nil {
		return err
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	return os.WriteFile(filepath.Join(pki, "sa.key"), private, 0o600)
}

const kubeconfig = `apiVersion: v1
kind: Config
current-context: e2e
contexts:
  - name: e2e
    context: {cluster: e2e, user: admin}
clusters:
  - name: e2e
    cluster:
      server: https://` + apiAddress + `
      certificate-authority: @DIR@/pki/apiserver.crt
users:
  - name: admin
    user: {token: ` + token + `}
`

// The kubelet runs with either version of cgroups, without iptables, and as a
// root that may lack capabilities.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /@CGROUP@
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
resolvConf: ""
clusterDNS: [10.96.0.10] # nobody is there
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 100Mi}
nodeStatusUpdateFrequency: 5s
syncFrequency: 10s
volumeStatsAggPeriod: 10s
featureGates: {CSIVolumeHealth: true}
`

const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + Sandbox + `"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "@DEBIAN@/usr/lib/cni"
    conf_dir = "@DIR@/cni"
`

const cniConfig = `{"cniVersion": "0.4.0", "name": "e2e", "plugins": [{
  "type": "bridge", "bridge": "` + bridge + `", "isGateway": true,
  "ipam": {
    "type": "host-local", "dataDir": "/run/cni",
    "ranges": [[{"subnet": "` + podNetwork + `"}]], "routes": [{"dst": "0.0.0.0/0"}]
  }
}]}
`

// components are the programs of the cluster and their arguments, in the order in
// which they are started. Each waits for those before by itself, but for the
// controllers, which give up without the API.
func (c *Cluster) components() [][]string {
	pki := filepath.Join(c.dir, "pki")
	kubeconfig := "--kubeconfig=" + c.Kubeconfig()
	return [][]string{
		{"containerd", "--config=" + filepath.Join(c.dir, "containerd.toml")},
		{
			"etcd", "--data-dir=" + filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=default=http://127.0.0.1:2380",
		},
		{
			"kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=443", "--bind-address=0.0.0.0",
			"--advertise-address=" + nodeAddress, "--endpoint-reconciler-type=none", "--service-cluster-ip-range=" + services,
			"--cert-dir=" + pki, "--token-auth-file=" + pki + "/tokens.csv", "--authorization-mode=Node,RBAC",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + pki + "/sa.key",
			"--service-account-signing-key-file=" + pki + "/sa.key", "--allow-privileged", "--profiling=false", "--kubelet-preferred-address-types=InternalIP",
			fmt.Sprintf("--feature-gates=%s", c.gates),
		},
		{
			"kube-controller-manager", kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1",
			"--service-account-private-key-file=" + pki + "/sa.key", "--root-ca-file=" + pki + "/apiserver.crt",
			"--flex-volume-plugin-dir=/run/flexvolumes",
		},
		{"kube-scheduler", kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1"},
		{
			"kubelet", kubeconfig, "--config=" + filepath.Join(c.dir, "kubelet.yaml"), "--hostname-override=" + Node,
			"--node-ip=" + nodeAddress, "--cert-dir=" + filepath.Join(pki, "kubelet"), "--v=2",
		},
	}
}
