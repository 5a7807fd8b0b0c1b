package engine

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"conex/internal/collect"
	"conex/internal/container"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/registry"
	"conex/internal/undo"

	apic "github.com/moby/moby/api/types/container"
)

// CreateRequest asks for a new container.
type CreateRequest struct {
	// Name is the container's name; empty picks two random words.
	Name string
	// Platform is os[/arch[/variant]] of the image; empty takes any that is there, and pulls this machine's.
	Platform string
	// Pull says when to ask the registry: "missing" (also ""), "always" or "never".
	Pull string
	// Config and HostConfig are Docker's; Config.Image names the image. HostConfig may be nil.
	Config     *apic.Config
	HostConfig *apic.HostConfig
	// Options are conex's own.
	Options container.Options
	// Networks are the container's places on networks, in the order of their interfaces; HostConfig.NetworkMode names the first. None
	// means that one, as it comes.
	Networks []container.Attachment
	// Quiet silences Progress.
	Quiet bool
	// Progress receives what a pull does.
	Progress Progress
}

// CreateResult is a new container.
type CreateResult struct {
	ID       string
	Warnings []string
}

// maxNameTries bounds the search for a random name that is free.
const maxNameTries = 20

// Create makes a container of an image, which is pulled if need be. Everything about the request that can be checked is checked
// first; on an error nothing stays. A nil error promises that the container survives a power loss, unless it is to be removed at
// its end.
func (e *Engine) Create(ctx context.Context, req CreateRequest) (CreateResult, error) {
	rec, _, warnings, err := e.create(ctx, req, false)
	if err != nil {
		return CreateResult{}, classify(err)
	}
	return CreateResult{ID: rec.ID, Warnings: warnings}, nil
}

// create is Create for who starts the container at once: with hold it is locked from before it exists, so that no prune removes it
// before it runs. Of one that is to be removed at its end (--rm), lease says so to settlers, so that it does not outlive a creator that
// dies before the start. Without hold the lock is nil.
func (e *Engine) create(ctx context.Context, req CreateRequest, hold bool) (rec *container.Record, lock *disk.Lock, warnings []string, err error) {
	if req.Config == nil || req.Config.Image == "" {
		return nil, nil, nil, invalid("invalid reference format: no image specified")
	}
	req.Name = strings.TrimPrefix(req.Name, "/") // as inspect shows it
	conf := *req.Config
	hc := apic.HostConfig{}
	if req.HostConfig != nil {
		hc = *req.HostConfig
	}
	if req.Name != "" {
		if err := container.CheckName(req.Name); err != nil {
			return nil, nil, nil, err
		}
	}
	warnings, err = e.validate(ctx, &conf, &hc)
	if err != nil {
		return nil, nil, nil, err
	}
	if req.Options.Egress, err = validateEgress(req.Options.Egress, &hc); err != nil {
		return nil, nil, nil, err
	}
	links, err := e.links(&hc)
	if err != nil {
		return nil, nil, nil, err
	}
	img, lease, err := e.imageFor(ctx, req)
	if err != nil {
		return nil, nil, nil, err
	}
	defer lease.Close()
	mergeImage(&conf, img.Config.Config)
	if err := validateOnFailure(req.Options.HealthOnFailure, &conf); err != nil {
		return nil, nil, nil, err
	}
	path, args, err := command(&conf)
	if err != nil {
		return nil, nil, nil, err
	}
	ls, err := e.Layers()
	if err != nil {
		return nil, nil, nil, err
	}
	driver, _ := ls.Driver()
	rec = &container.Record{
		ID: disk.RandomID(), Name: req.Name, Created: time.Now().UTC(), Image: req.Config.Image, ImageID: img.ID, Layers: img.Layers(),
		Config: &conf, HostConfig: &hc, Path: path, Args: args, Platform: platformOf(img), Driver: driver, Options: req.Options, Networks: req.Networks,
	}
	rec.Options.Links = links
	if rec.Networks, err = e.attachments(ctx, rec); err != nil {
		return nil, nil, nil, err
	}
	if conf.Hostname == "" {
		conf.Hostname = rec.ID[:12]
		if hc.NetworkMode.IsHost() || hc.UTSMode.IsHost() {
			if conf.Hostname, err = os.Hostname(); err != nil {
				return nil, nil, nil, err
			}
		}
	}
	vols, err := e.Volumes().LockUse()
	if err != nil {
		return nil, nil, nil, err
	}
	var made []string // volumes, which another container may have got meanwhile
	defer func() {
		vols.Release()
		if err != nil {
			// A volume is easily made again; one that stays behind is only found by looking.
			_ = e.removeAnonymous(ctx, made)
		}
	}()
	var back undo.Stack
	defer back.Run()
	mounted, err := e.addMounts(ctx, rec, &made)
	if err != nil {
		return nil, nil, nil, err
	}
	defer mounted()
	numbers, err := e.giveNumbers(ctx, rec)
	if err != nil {
		return nil, nil, nil, err
	}
	defer numbers.Release()
	if hold {
		if hc.AutoRemove {
			lock, err = e.lease(ctx, rec)
		} else {
			lock, err = e.Containers().LockIdle(ctx, rec.ID) // a settler that goes by may hold it for a moment
		}
		if err != nil {
			return nil, nil, nil, err
		}
		id, held := rec.ID, lock // the results are nil by the time that this runs
		back.Add(func() {
			// Whatever stays of the run folder, the next settler removes.
			_ = e.Containers().RemoveRun(id)
			held.Release()
		})
	}
	if err := e.publish(rec); err != nil {
		return nil, nil, nil, err
	}
	back.Forget()
	e.event(rec, "create", nil)
	return rec, lock, warnings, nil
}

// lease locks a container that does not exist yet and leaves a state with which a settler removes it, should the lock be free.
func (e *Engine) lease(ctx context.Context, rec *container.Record) (*disk.Lock, error) {
	cs := e.Containers()
	lock, err := cs.LockIdle(ctx, rec.ID) // a settler that goes by may hold it for a moment
	if err != nil {
		return nil, err
	}
	err = cs.SetState(rec.ID, &container.State{
		Status: container.Starting, BootID: disk.BootID(), AutoRemove: true, Anonymous: rec.Anonymous,
	})
	if err != nil {
		err = errors.Join(err, cs.RemoveRun(rec.ID))
		lock.Release()
		return nil, err
	}
	return lock, nil
}

// publish writes the record under its name, or under random ones until one is free.
func (e *Engine) publish(rec *container.Record) error {
	given := rec.Name != ""
	for try := 0; ; try++ {
		if !given {
			rec.Name = container.RandomName(try)
		}
		err := e.Containers().Create(rec, nil)
		if given || !errors.Is(err, container.ErrNameTaken) || try == maxNameTries {
			return err
		}
	}
}

// imageFor finds or pulls the image and leases its layers.
func (e *Engine) imageFor(ctx context.Context, req CreateRequest) (image.Image, *collect.Lease, error) {
	images, err := e.Images()
	if err != nil {
		return image.Image{}, nil, err
	}
	name := req.Config.Image
	pull := req.Pull == "always"
	for {
		var img image.Image
		if pull {
			img, _, err = e.Pull(ctx, PullRequest{Reference: name, Platform: req.Platform, Quiet: req.Quiet, Progress: req.Progress})
		} else {
			img, err = images.Find(name)
			if err == nil && !fits(img, req.Platform) {
				img, err = variantFor(images, name, req.Platform)
			}
			if errors.Is(err, image.ErrNotFound) && req.Pull != "never" {
				if ref, rerr := image.ParseReference(name); rerr == nil {
					req.Progress.emit(Event{Message: "Unable to find image '" + ref.Familiar() + "' locally"})
				}
				pull = true
				continue
			}
		}
		if err != nil {
			return image.Image{}, nil, err
		}
		lease, err := collect.Hold(e.root, append(slices.Clone(img.Layers()), img.ID)...)
		if err != nil {
			return image.Image{}, nil, err
		}
		// Removed between our look and our lease: look again, which pulls it again or says that it is not there.
		if err := images.Exists(img.ID); err != nil {
			lease.Close()
			if errors.Is(err, image.ErrNotFound) {
				continue
			}
			return image.Image{}, nil, err
		}
		return img, lease, nil
	}
}

// variantFor finds the image of another platform that a name leads to as well.
func variantFor(images *image.Store, name, platform string) (image.Image, error) {
	want, err := registry.ParsePlatform(platform)
	if err != nil {
		return image.Image{}, &kindError{ErrInvalid, err}
	}
	return images.ResolvePlatform(name, want)
}

// fits reports whether an image is of a platform that was asked for.
func fits(img image.Image, platform string) bool {
	if platform == "" || img.Config.OS == "" {
		return true
	}
	p, err := registry.ParsePlatform(platform)
	if err != nil {
		return false
	}
	return p.OS == img.Config.OS && p.Architecture == img.Config.Architecture && (p.Variant == "" || p.Variant == img.Config.Variant)
}

func platformOf(img image.Image) string {
	p := img.Config.Platform
	if p.OS == "" {
		return "linux/" + runtime.GOARCH
	}
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}
