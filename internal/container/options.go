package container

// Options are what conex lets a user say about a container and Docker's HostConfig has no field for. The zero value is Docker's
// behaviour.
type Options struct {
	// HealthOnFailure is what happens when the container becomes unhealthy: "" nothing, "kill", "restart" or "stop".
	HealthOnFailure string `json:"healthOnFailure,omitempty"`
	// Egress is what the container may reach, as --egress says it (package egress); empty is all.
	Egress []string `json:"egress,omitempty"`
	// Links are HostConfig.Links resolved: a name may mean another container later.
	Links []Link `json:"links,omitempty"`
	// IDMap says of binds, by destination, whom files of the container's user belong to: "auto" whoever owns the source, or "UID:GID".
	IDMap map[string]string `json:"idMap,omitempty"`
	// Overlay says of binds and volumes, by destination, that the container changes a copy on write, and what becomes of the changes:
	// OverlayDiscard or OverlayKeep.
	Overlay map[string]string `json:"overlay,omitempty"`
	// Users are the host's ids that are the container's own (--userns auto), nil without a user namespace.
	Users *IDs `json:"users,omitempty"`
	// Project is the number under which the file system counts what the container writes (--storage-opt size), 0 for none.
	Project uint32 `json:"project,omitempty"`
}

// What becomes of changes in an overlay mount: gone with the run, or kept until the container is removed.
const (
	OverlayDiscard = "discard"
	OverlayKeep    = "keep"
)

// Link is another container that is known by a further name (--link).
type Link struct {
	ID    string `json:"id"`
	Alias string `json:"alias"`
}
