package driver

import (
	"context"
	"path/filepath"

	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrar answers kubelet's plugin watcher (pluginregistration v1), which finds
// its socket in <kubelet-dir>/plugins_registry.
type registrar struct {
	registration.UnimplementedRegistrationServer
	endpoint string // the path of the CSI socket
}

// csiVersions are the versions of CSI that are served, as kubelet compares them.
var csiVersions = []string{"1.0.0"}

func registrationSocket(kubeletDir string) string {
	return filepath.Join(kubeletDir, "plugins_registry", Name+"-reg.sock")
}

func (r *registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: "CSIPlugin", Name: Name, Endpoint: r.endpoint, SupportedVersions: csiVersions}, nil
}

// NotifyRegistrationStatus hears how it went. After a failure kubelet tries again
// by itself.
func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		klog.InfoS("Registered with kubelet", "endpoint", r.endpoint)
	} else {
		klog.ErrorS(nil, "Kubelet does not register the plugin", "endpoint", r.endpoint, "reason", s.GetError())
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// newRegistration is the server for kubelet.
func newRegistration(endpoint string) *grpc.Server {
	s := grpc.NewServer()
	registration.RegisterRegistrationServer(s, &registrar{endpoint: endpoint})
	return s
}
