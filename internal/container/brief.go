package container

import (
	"errors"
	"io/fs"
	"time"

	"conex/internal/disk"
	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
)

// brief is what a list shows of a record, and filters it by. Decoding the rest takes twice as long, which shows with hundreds.
type brief struct {
	ID      string           `json:"id"`
	Name    string           `json:"name"`
	Created time.Time        `json:"created"`
	Image   string           `json:"image"`
	ImageID ocispec.Digest   `json:"imageID"`
	Layers  []ocispec.Digest `json:"layers"`
	Config  struct {
		Labels       map[string]string
		ExposedPorts network.PortSet
	} `json:"config"`
	HostConfig struct{ NetworkMode apic.NetworkMode } `json:"hostConfig"`
	Path       string                                 `json:"path"`
	Args       []string                               `json:"args"`
	Mounts     []apic.MountPoint                      `json:"mounts"`
	Networks   []Attachment                           `json:"networks"`
	Options    struct {
		Egress []string `json:"egress"`
	} `json:"options"`
}

// loadBrief is Load with the fields of brief alone.
func (s *Store) loadBrief(id string) (*Record, error) {
	var b brief
	if err := disk.ReadJSON(s.Dir(id, "config.json"), &b); err != nil {
		if errors.Is(err, fs.ErrNotExist) || s.Hollow(id) {
			return nil, &NotFoundError{id}
		}
		return nil, err
	}
	return &Record{
		ID: b.ID, Name: b.Name, Created: b.Created, Image: b.Image, ImageID: b.ImageID, Layers: b.Layers, Path: b.Path, Args: b.Args,
		Mounts: b.Mounts, Networks: b.Networks, Config: &apic.Config{Labels: b.Config.Labels, ExposedPorts: b.Config.ExposedPorts},
		HostConfig: &apic.HostConfig{NetworkMode: b.HostConfig.NetworkMode}, Options: Options{Egress: b.Options.Egress},
	}, nil
}

// Brief is Snapshot for lists: the record has no more than they show and filter by. st is the state of a container whose monitor lives,
// with which nothing else need be read; nil reads all.
func (s *Store) Brief(id string, st *State) (*Snapshot, error) {
	if st == nil {
		return s.snapshot(id, s.loadBrief)
	}
	r, err := s.loadBrief(id)
	if err != nil {
		return nil, err
	}
	return &Snapshot{Record: r, State: st}, nil
}
