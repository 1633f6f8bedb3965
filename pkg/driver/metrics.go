package driver

import (
	"errors"
	"net"
	"net/http"
	"time"

	"k8s.io/klog/v2"
)

// serveMetrics serves /metrics and /healthz until the listener is closed.
func (p *plugin) serveMetrics(l net.Listener) {
	mux := http.NewServeMux()
	mux.Handle("/metrics", p.metrics.Handler())
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !p.ready.Load() {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n")) // if the client is gone, nobody is there to tell
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	if err := s.Serve(l); err != nil && !errors.Is(err, net.ErrClosed) {
		klog.ErrorS(err, "Metrics are not served any more")
	}
	s.Close() // connections that clients keep
}
