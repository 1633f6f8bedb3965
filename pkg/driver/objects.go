package driver

import (
	"sync"
	"time"

	"github.com/snapmerge/snapmerge/pkg/kube"
)

// stagings are how long it took to bring volumes into service for the first time, by
// volume. The zero value is ready.
type stagings struct {
	mu    sync.Mutex
	first map[string]time.Duration
}

func (s *stagings) add(volume string, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == nil {
		s.first = map[string]time.Duration{}
	}
	if s.first[volume] == 0 {
		s.first[volume] = took
	}
}

func (s *stagings) forget(volume string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.first, volume)
}

func (s *stagings) of(volume string) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.first[volume]
}

// objects are the volumes as package kube wants them.
type objects struct{ *plugin }

func (o objects) List() []kube.Volume {
	var all []kube.Volume
	for _, id := range o.volumes.IDs() {
		s, err := o.volumes.Status(id)
		if err != nil {
			continue // deleted just now
		}
		v := kube.Volume{Status: s, StagedIn: o.staged.of(id)}
		if open, err := o.volumes.Get(id); err == nil {
			v.Record = open.Record()
		}
		all = append(all, v)
	}
	return all
}

func (o objects) SetPaused(id string, paused bool) error {
	v, err := o.volumes.Get(id)
	if err != nil {
		return err
	}
	return v.SetPaused(paused)
}

func (o objects) SetRate(id string, mib int) error {
	v, err := o.volumes.Get(id)
	if err != nil {
		return err
	}
	return v.SetRate(mib)
}
