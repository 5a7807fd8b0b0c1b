package container

// Options are what conex lets a user say about a container and Docker's HostConfig has no field for. The zero value is Docker's
// behaviour.
type Options struct {
	// HealthOnFailure is what happens when the container becomes unhealthy: "" nothing, "kill", "restart" or "stop".
	HealthOnFailure string `json:"healthOnFailure,omitempty"`
	// Links are HostConfig.Links resolved: a name may mean another container later.
	Links []Link `json:"links,omitempty"`
}

// Link is another container that is known by a further name (--link).
type Link struct {
	ID    string `json:"id"`
	Alias string `json:"alias"`
}
