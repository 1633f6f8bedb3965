package dmuser

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/dmusermock"
)

const patience = devicetest.Patience

// mock is a mapping whose devices are targets in this process.
type mock struct {
	maxRead int // of the targets that it makes

	mu      sync.Mutex
	targets map[string]*dmusermock.Target
	sizes   map[string]int64
	active  map[string]bool
	busy    bool
}

func newMock() *mock {
	return &mock{targets: map[string]*dmusermock.Target{}, sizes: map[string]int64{}, active: map[string]bool{}}
}

func (m *mock) make(name string, size int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.targets[name] = dmusermock.New()
	m.targets[name].MaxRead = m.maxRead
	m.sizes[name] = size
	return nil
}

func (m *mock) activate(name string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.targets[name].Channels() == 0 {
		return "", unix.EIO // requests would have nobody to go to
	}
	m.active[name] = true
	return "/mock/" + name, nil
}

func (m *mock) find(name string) (string, int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.active[name] {
		return "", 0, transport.ErrNotFound
	}
	return "/mock/" + name, m.sizes[name], nil
}

func (m *mock) list() (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.targets {
		names = append(names, name)
	}
	return names, nil
}

func (m *mock) open(name string) (control, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.targets[name]; t != nil {
		return t.Open()
	}
	return nil, unix.ENOENT
}

func (m *mock) remove(name string) (bool, error) {
	m.mu.Lock()
	busy := m.busy
	m.mu.Unlock()
	if busy {
		return true, nil
	}
	return false, m.destroy(name)
}

func (m *mock) destroy(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.targets[name]; t != nil {
		t.Destroy()
		delete(m.targets, name)
		delete(m.active, name)
	}
	return nil
}

func (m *mock) setBusy(busy bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy = busy
}

// target is that of a device.
func (m *mock) target(d *device) *dmusermock.Target {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.targets[d.meta.Name]
}

func within(t testing.TB, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// create makes a device on a mock, which is closed at the end of the test without
// a breach of the protocol.
func create(t testing.TB, m *mock, b transport.Backend, o transport.Options) (*device, *dmusermock.Target) {
	t.Helper()
	tr := New(nil)
	tr.mapping = m
	dev, err := tr.Create(within(t, patience), "v", b, o)
	if err != nil {
		t.Fatal(err)
	}
	d := dev.(*device)
	target := m.target(d)
	t.Cleanup(func() {
		if err := d.Close(within(t, patience)); err != nil {
			t.Error(err)
		}
		noBreach(t, target)
		if n := target.Channels(); n != 0 && !t.Failed() {
			t.Errorf("%d channels are still open", n)
		}
	})
	return d, target
}

func noBreach(t testing.TB, target *dmusermock.Target) {
	t.Helper()
	if notes := target.Notes(); len(notes) > 0 {
		t.Errorf("breaches of the protocol: %s", strings.Join(notes, "; "))
	}
}

// answered waits for the outcome of a request.
func answered(t testing.TB, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatal("a request is never answered")
		return nil
	}
}
